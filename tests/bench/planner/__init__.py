"""The planner against fixed pools and Ray Serve's default, in the simulator."""
