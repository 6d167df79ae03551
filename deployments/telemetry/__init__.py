"""What people and their tools see of the service: metrics, and a line and a trace of each call.

Reads what other parts count; decides nothing, and nothing waits for it.
"""
