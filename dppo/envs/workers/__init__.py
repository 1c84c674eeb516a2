"""Environments in worker processes, several in each, with the results of `SyncVectorEnv` bit for bit.

- `vector_env.py`: the vector environment, in the process that trains
- `process.py`: one worker process, as seen from there: started, asked, ended
- `worker.py`: what runs in it
- `records.py`: the memory that both sides share
- `choice.py`: how many workers pay
"""
