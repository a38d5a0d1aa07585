package countersign

# Nothing sensitive while nobody is there to notice.
deny contains "not between 22:00 and 06:00 in Berlin" if {
	input.sensitivity != "low"
	night
}

approval contains "nobody has proved to stand behind it" if {
	input.scope == "vault:demo-read"
	input.subject.id != ""
	not input.subject.proved
}

shorten contains {"ttl": "1m", "reason": "certificates of trial runs live a minute"} if {
	input.scope == "pki:service"
	startswith(input.run, "trial-")
}

night if hour >= 22

night if hour < 6

hour := time.clock([time.parse_rfc3339_ns(input.time), "Europe/Berlin"])[0]
