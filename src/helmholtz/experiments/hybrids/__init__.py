"""What only a hybrid can show: a plan over Free Energy Mixers, and an equilibrium over them."""
