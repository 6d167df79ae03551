"""What people and their tools see of the service: metrics, today.

Reads what other parts count; decides nothing, and nothing waits for it.
"""
