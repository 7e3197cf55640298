"""The demo: functions that explain a classification of EfficientVMamba, and a web page that shows them."""
