"""Tables and pages from finished runs.

tables        one table, two readers
sweep_table   a line per comparison of a sweep
compare_page  a comparison as a page
study_page    a study as a page
study_tables  its tables, for the page, Markdown and CSV
inspector_page  what routing does, as a page
inspector_tables  its sentences, tables and small charts
inspector_data  what its script is given
watch_view    a run as it trains, for a terminal
packed        arrays inside it
charts        lines and points as SVG
scaling_page  what the fits of scaling laws say
coverage_table  how often verdicts hold
trust_table   which metrics of routing may be believed
claims_page   the ledger of published claims
router_table  a line per file of conf/router
branch_tables  what branch-train-mix came to
simulate_table  what steps on many GPUs would take
diversity_table  what more kinds of task did for others
help_page     what `--help` prints
"""
