"""Update rules: a surrogate times a step."""
