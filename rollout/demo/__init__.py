"""The demo: tables to a trained model, attributions, pictures and a comparison with PyHealth, in one command."""
