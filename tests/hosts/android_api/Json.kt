// Declares what examples/hosts/android uses of org.json, which is a part of Android.
package org.json

class JSONObject(@Suppress("UNUSED_PARAMETER") text: String) {
    fun getJSONObject(name: String): JSONObject = TODO(name)

    fun getJSONArray(name: String): JSONArray = TODO(name)

    fun getString(name: String): String = TODO(name)

    fun getInt(name: String): Int = TODO(name)

    fun getDouble(name: String): Double = TODO(name)
}

interface JSONArray {
    fun length(): Int

    fun getDouble(index: Int): Double

    fun getJSONObject(index: Int): JSONObject
}
