"""``zipvl calibrate``: the fastest setting whose loss on one's own samples is within a bound."""
