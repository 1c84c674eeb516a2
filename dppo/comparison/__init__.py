"""Methods compared over tasks and seeds: which runs there are, running them, and what came of them."""
