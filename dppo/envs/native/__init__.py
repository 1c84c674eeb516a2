"""Gymnasium's MuJoCo environments, stepped in batches without a Python environment each, and equal to them bit for bit.

- `rules.py`: what makes physics a task: first states, observations, rewards, terminations
- `locomotion.py`, `planar.py`, `spatial.py`, `pendulums.py`, `arms.py`: the rules of the environments there are
- `registry.py`: from an environment of Gymnasium to its rules
- `physics.py`: the simulations of N environments, advanced by several threads
- `vector_env.py`: physics, rules and episodes make a vector environment
"""
