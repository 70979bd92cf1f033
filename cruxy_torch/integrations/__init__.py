"""`CruxyOptimizer` inside other libraries' training loops: one module each, imported by name."""
