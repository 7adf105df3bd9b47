"""What only a durable, shared store can get wrong: crashes, leases, full disks, other programs."""

import asyncio
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from conftest import until, write_locked  # type: ignore[import-not-found]

from protos.errors import Reason, Refusal
from teacher_service import ledger as rules
from teacher_service import ledger_sql
from teacher_service.ledger import (
    Account,
    Held,
    HoldRequest,
    LedgerError,
    LedgerUnavailable,
    Posted,
)
from teacher_service.ledger_sql import SqlLedger
