"""The mathematics: pure functions of tensors that know nothing of models, files or trainers.

Every objective returns one value per token, example or query, unreduced, in at least float32; only
`DistillationMixin.mean_over_step` averages.

Shape letters, used in every docstring of the package: B batch, S tokens, V vocabulary, C classes, K subclasses per
class, H hidden width, D embedding width, N candidates per query (or counted tokens where a loss is chunked),
M teachers, R dataset rows.
"""
