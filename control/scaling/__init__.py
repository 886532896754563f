"""How many workers are wanted: from predicted work, arrivals and late requests.

`demand.py` asks the scheduler, `need.py` and `hysteresis.py` decide (pure: no clock, no I/O),
`catalogue.py` knows the models that workers served, `signal.py` runs it all beside a leader.
"""
