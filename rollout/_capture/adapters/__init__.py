"""One module per family of attention modules: a function `adapter(model)`, imported when its library is in use."""
