"""Networks: built from a config, checked, loaded, behind one interface."""
