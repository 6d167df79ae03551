"""What the pools' numbers say of their load, and who may come in.

`pool_watch` reads the numbers again and again and passes each `reading` on; whoever decides by the load is told of it:
`admission` today. `outlook` says what a reading means for a prompt that comes now, with what it learned from those
before (`step_cost`) and what this replica itself let in since (`own_share`). `pool_health` asks whether a pool can
serve at all. Nothing here knows Ray or HTTP: the ingress brings the numbers, and refuses those who may not come in.
"""
