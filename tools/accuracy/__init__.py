"""The accuracy study's parts: what is compared, what is still to run, what was measured, tables and pictures.

`tools/study.py` is its door. All but `costs` and `pictures` import neither torch nor matplotlib.
"""
