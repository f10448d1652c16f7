"""Metrics of groups of samples, the conclusions from them, and the report.

reading    which volumes are compared, and reading them onto one grid
groups     groups of volumes reduced to features, spectra, histograms and tissue volumes
features   feature networks: the run's autoencoder, MedicalNet, RadImageNet
distances  kernel and Fréchet distances, precision and recall, intervals, the permutation test
copies     the search for copies of training scans
label_maps the same for label maps without images, by sizes, parts and overlap
table      the table of metrics, each with its real-vs-real baseline
verdicts   the conclusions in words
content    closest pairs, curves and distributions for the report
report     the page, from report.html
"""
