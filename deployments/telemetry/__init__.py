"""What people and their tools see of the service: metrics, and a line for each call.

Reads what other parts count; decides nothing, and nothing waits for it.
"""
