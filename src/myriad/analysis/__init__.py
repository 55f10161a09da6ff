"""What trained runs tell: the use of their experts, comparisons, figures and the report.

Nothing is imported here, since only `plots` and `report` need matplotlib.
"""
