"""The nets: the blueprint of a global model, a worker's sub-ResNet in flat vectors, initial values.

No communication.
"""
