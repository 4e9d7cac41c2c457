"""These tests need triton, which is 1 GB, and a process that interprets it: ``make test-triton``."""

from interpreted import INTERPRETED

collect_ignore_glob = [] if INTERPRETED else ["*"]
