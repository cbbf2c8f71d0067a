"""draft"""
def markdown(path): return ""
def summary(path): return ""
