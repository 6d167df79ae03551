"""How many replicas each pool needs: one decision for both, from what the engines say of themselves.

`observer` turns readings into an `observation`; `need` says what load needs how many engines; `plan` decides, and says
why. Pure: no Ray, no clock. `deployments/pool_policy.py` has Ray Serve follow it, `deployments/simulator/` plays it.
"""
