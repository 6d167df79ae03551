"""Plays a trace to modelled engines, with the project's own admission, routers and planner.

`python -m deployments.simulator --help`. `service` is the ingress and both pools, `engine` what an engine takes, by
`curves` that were measured; `scaling` are ways to choose how many replicas there are, the planner among them. Time is
virtual: simpy keeps it.
"""
