"""`peft-gradinit export`: an adapter in the form that is needed."""
