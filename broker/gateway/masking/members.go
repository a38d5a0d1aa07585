package masking

// Members reports whether there are rules for members of JSON documents, so
// that a part of a document can be what they hide.
func (m *Masker) Members() bool { return m != nil && (len(m.fields) > 0 || len(m.paths) > 0) }
