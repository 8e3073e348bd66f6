"""Parts that several tests share: small learners, curators, ledgers and data."""
