"""Mean-field neural networks: the theory's own setting, in pure torch.

model.py      networks as particles, their objective, its first variation and gradient in closed form
langevin.py   noisy gradient descent of many networks, each with noise of its own key
problems.py   double circle, multi-index regression, and linear regression for the solvable analogue
ensemble.py   merging, pruning, distances
theory.py     the bounds
gaussian.py   the solvable analogue: every law in closed form
experiments/  figure1, figure2, table2 and poc: computed in cells, drawn, written
commands.py   their verbs
"""
