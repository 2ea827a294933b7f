"""What a forked child of the tests does, and how it ends."""

import logging
import os
import sys
import traceback


def work_and_end(work, log):
    """Work in a forked child, and end it with the status that the work returns; never returns.

    Args:
        work: Called with nothing; None counts as 0.
        log: Gets what it tells.
    """
    status = 99
    try:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        os.dup2(2, 1)
        sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1)
        logging.getLogger().handlers.clear()  # pytest's, which would keep it all
        status = work()
    except BaseException:  # noqa: BLE001 - the child must end here
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status or 0)
