"""`python -m resist_ds`, from a checkout and under every launcher's plain form. See `train.py --help`."""

from resist_ds.__main__ import main

if __name__ == "__main__":
    main()
