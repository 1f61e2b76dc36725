"""The pages and plots, rendered from the records, so that no figure is typed by hand."""
