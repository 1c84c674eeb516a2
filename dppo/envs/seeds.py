"""Seeds of the environments of a vector environment."""


def seeds_of(seed: int | list[int | None] | None, num_envs: int) -> list[int | None]:
    """Gymnasium's convention: environment i gets seed + i, or its own of a list; without a seed None, to go on.

    Raises:
        ValueError: a list of another length.
    """
    seeds = [seed + i for i in range(num_envs)] if isinstance(seed, int) else seed or [None] * num_envs
    if len(seeds) != num_envs:
        raise ValueError(f"expected {num_envs} seeds, got {len(seeds)}")
    return list(seeds)
