"""A running job's figures in a file for `moe-gpu top`: `publisher.py` writes it, `status.py` says what it holds."""
