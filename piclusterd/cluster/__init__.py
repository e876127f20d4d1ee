"""Who is here, who leads: membership* and election*; discovery, links and identity are their hands. (* decides)"""
