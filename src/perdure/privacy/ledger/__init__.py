"""The ledger: every charge on disk before its noise is drawn."""
