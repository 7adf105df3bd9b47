"""What every test shares. Real parts: a real server process on a free port, real SQLite files."""

import os

# Before torch is imported anywhere: tests run side by side, and threads that wait for each other by spinning would
# make every one of them many times slower. Processes that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
# The tests must not depend on a developer's own settings.
for name in ("MEKD_API_KEY", "MEKD_LEDGER"):
    os.environ.pop(name, None)
