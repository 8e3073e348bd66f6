"""The curator: it holds private records and answers releases."""
