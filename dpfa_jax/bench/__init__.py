"""Measurements behind ``dpfa bench``: speed of attention beside its peers, block sizes."""
