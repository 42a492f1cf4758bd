"""The data: which sample when, the data sets, where images wait, and their augmentation.

Everything random is a pure function of (seed, epoch, sample). No communication.
"""
