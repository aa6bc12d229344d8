"""The colours of the figures: Okabe and Ito's, which colour-blind readers can tell apart."""

ADAMW = "#000000"
GUARD = "#D55E00"  # vermilion
OTHERS = ("#0072B2", "#009E73", "#CC79A7")  # blue, green, purple
GREY_LINE = "#BDBDBD"
LOST, KEPT = "#E69F00", "#0072B2"  # orange, blue
