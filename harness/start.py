"""Ctrl-C while a command's libraries are imported, which takes seconds, ends it without a traceback.

What is run as a command imports this first. Once it works, `harness.stopping.exit_status` takes the signal.
"""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else a shell has it ignored
    signal.signal(signal.SIGINT, signal.SIG_DFL)
