//go:build slow

package main

// abuseRequests is how many malformed requests are sent.
const abuseRequests = 1_000_000
