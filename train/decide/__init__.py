"""From a run to a decision: a threshold with a guarantee, and everything that uses it.

`conformal.py` is the mathematics, `rule.py` what is decided by, `record.py` the file that holds it;
`calibrate.py` makes one, `predict.py` decides about images, `export.py` ships it, `monitor.py`
watches it.
"""
