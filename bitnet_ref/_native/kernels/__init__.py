"""One extension module per kernel variant, named as the registry names it; built from templates/."""
