"""Measurements, apart from the tests: warm, in turns, checked against the reference first, recorded with origin."""
