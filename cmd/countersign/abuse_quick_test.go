//go:build !slow

package main

// abuseRequests is how many malformed requests are sent.
const abuseRequests = 20_000
