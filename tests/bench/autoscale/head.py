"""The head of the cluster: `ray start`, on a machine that is busy. `cluster.py` starts it."""

from ray.scripts.scripts import main

from app.ray_agents import choose_ports

if __name__ == "__main__":
    choose_ports()
    main()
