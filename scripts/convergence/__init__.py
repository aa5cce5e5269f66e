"""The benchmark of convergence: tasks, methods, one run, the plan of a study, and its report."""
