"""The contract between training and everything after it: a committed checkpoint."""
