"""Imported by the server that forks loader processes, and by nobody else: SIGTERM is for the rank alone.

A signal to all processes of a job (SLURM, systemd) would else end the server, and the loaders with it, while
the rank finishes its round. The server ends with its rank.
"""

import signal

signal.signal(signal.SIGTERM, signal.SIG_IGN)
